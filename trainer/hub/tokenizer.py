"""The tokenizer for others: a sentencepiece model -> tokenizer.json, which `AutoTokenizer` of transformers loads.

It encodes exactly as `Tokenizer.encode` does, with bos before and no eos, and decoding gives the text back:

1. Sentencepiece merges the neighbours whose union is the best piece, wherever that union comes from; the `tokenizers`
   library wants pairs. So the merges are every split of a piece into two pieces, the best pieces first.
2. Sentencepiece writes a blank as U+2581. Here a blank is a blank, in the pieces too: no text is changed before the
   merges, and a U+2581 in a text is a character without a piece, whose three bytes become three tokens, as with us.
3. What spells a special token (`<s>`) or a byte (`<0x0A>`) is plain text. For special tokens that takes the setting
   `split_special_tokens`, which stands in tokenizer_config.json; who reads tokenizer.json alone with the `tokenizers`
   library sets `encode_special_tokens = True`, or text that spells `<s>` becomes bos.

What cannot match: bytes that are no UTF-8 (a character cut in half) decode to U+FFFD here too, though maybe to another
number of them. Models of others that begin each text with a blank, as Llama 2's, or have no bytes, are exact too but
for U+2581 in a text; those that change texts or split them by rules of their own are refused.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.settings import UserError
from data.tokenizer import SPACE_SYMBOL, Tokenizer, write_atomic

if TYPE_CHECKING:
    import tokenizers

PROBES = ("Once upon a time.\n\n", "  two\tblanks \r\n", "<s></s><0x0A>漢字 🎉", "x", "")


def export_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and tokenizer.model to `folder`, for texts of `max_length` tokens.

    Raises UserError where the extra `hub` is not installed, or the model is of a kind that this form cannot express.
    """
    try:
        fast = convert(tokenizer)
    except ImportError as error:
        raise UserError(f"a tokenizer for others takes the extra `hub`: pip install -e '.[hub]' ({error})") from None
    for text in PROBES:
        if fast.encode(text).ids != [tokenizer.bos, *tokenizer.encode(text)]:
            raise UserError(f"{tokenizer.path}: cannot be written as tokenizer.json: {text!r} would become other ids")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.piece(tokenizer.bos),
        "eos_token": tokenizer.piece(tokenizer.eos),
        "unk_token": tokenizer.piece(tokenizer.unk),
        "pad_token": tokenizer.piece(tokenizer.pad),
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,  # text that spells one is text
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    write_atomic(folder / "tokenizer.json", fast.to_str(pretty=True).encode())
    write_atomic(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_atomic(folder / "tokenizer.model", tokenizer.path.read_bytes())


def convert(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """The same tokenizer for the `tokenizers` library. Raises UserError where there is none."""
    import tokenizers
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    model = ModelProto.FromString(tokenizer.path.read_bytes())
    if why := _beyond(model):
        raise UserError(
            f"{tokenizer.path}: cannot be written as tokenizer.json, since {why}; "
            "a model made by data.tokenizer=train can"
        )
    kinds, ids, scores = ModelProto.SentencePiece, dict[str, int](), dict[str, float]()
    for id, piece in enumerate(model.pieces):
        if piece.type == kinds.NORMAL:
            scores[piece.piece.replace(SPACE_SYMBOL, " ")] = piece.score
            ids[piece.piece.replace(SPACE_SYMBOL, " ")] = id
        else:
            ids[piece.piece] = id
    splits = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    bos, unk = tokenizer.piece(tokenizer.bos), tokenizer.piece(tokenizer.unk)
    bytes_known = model.trainer_spec.byte_fallback
    fast = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[pair for *_, pair in sorted(splits)],
            byte_fallback=bytes_known,
            unk_token=unk,
            fuse_unk=not bytes_known,
        )
    )
    decoding = [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        fast.normalizer = normalizers.Prepend(" ")
        decoding.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(decoding)
    fast.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos)]
    )
    special = [piece.piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    fast.encode_special_tokens = True  # of this object only: the file has no place for it
    return fast


def _beyond(model: Any) -> str | None:
    """Why a model is none of those that can be expressed: our own, and those like Llama 2's."""
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    if trainer.model_type != trainer.BPE:
        return "it is no BPE model"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return f"it changes texts before encoding them ({normalizer.name or 'blanks'})"
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return "it treats blanks in a way of its own"
    if any(piece.type in (kinds.USER_DEFINED, kinds.UNUSED) for piece in model.pieces):
        return "it has user-defined or unused pieces"
    if not any(piece.piece == SPACE_SYMBOL for piece in model.pieces):
        return "it has no piece for a blank"
    return None
