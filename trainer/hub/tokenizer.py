"""Converts a sentencepiece model to tokenizer.json, which `AutoTokenizer` of transformers loads.

The result encodes exactly as `Tokenizer.encode` does, with bos before the text and no eos after it, and decodes to the
same text. Three differences between the two formats need care:

1. Sentencepiece merges the two neighbours whose union is the piece with the highest score. The `tokenizers` library
   needs an ordered list of pairs instead. So the list has every split of a piece into two pieces, in the order of the
   scores of the pieces.
2. Sentencepiece replaces each space by U+2581. The converted tokenizer keeps the spaces, in its pieces too: it does not
   change a text before the merges. U+2581 in a text is then a character without a piece, whose three bytes become three
   tokens, as in `Tokenizer.encode`.
3. A text that spells a special token (`<s>`) or a byte (`<0x0A>`) is plain text. For special tokens this depends on the
   setting `split_special_tokens` in tokenizer_config.json. A program that reads tokenizer.json alone with the
   `tokenizers` library must set `encode_special_tokens = True`; otherwise text that spells `<s>` becomes bos.

One thing cannot match: bytes that are not UTF-8, such as half of a character, decode to U+FFFD in both, but possibly to
a different number of them. Sentencepiece models from elsewhere that put a space before each text, as that of Llama 2
does, or that have no byte pieces are exact too, except for U+2581 in a text. Models that change texts, or split them by
other rules, are refused.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.settings import UserError
from data.tokenizer import SPACE_SYMBOL, Tokenizer, write_atomic

if TYPE_CHECKING:
    import tokenizers

# texts whose ids are compared before a converted tokenizer is written
PROBES = ("Once upon a time.\n\n", "  two\tblanks \r\n", "<s></s><0x0A>漢字 🎉", "x", "")


def export_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and tokenizer.model to `folder`, for texts of `max_length` tokens.

    Raises UserError if the extra `hub` is not installed, or if tokenizer.json cannot express the model.
    """
    try:
        converted = convert(tokenizer)
    except ImportError as error:
        hint = "install the extra `hub`: pip install -e '.[hub]'"
        raise UserError(f"tokenizer.json needs a package that is missing ({error}); {hint}") from None
    for text in PROBES:
        if converted.encode(text).ids != [tokenizer.bos, *tokenizer.encode(text)]:
            raise UserError(f"{tokenizer.path}: cannot be converted to tokenizer.json: {text!r} would have other ids")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.piece(tokenizer.bos),
        "eos_token": tokenizer.piece(tokenizer.eos),
        "unk_token": tokenizer.piece(tokenizer.unk),
        "pad_token": tokenizer.piece(tokenizer.pad),
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,  # a text that spells a special token is plain text
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    write_atomic(folder / "tokenizer.json", converted.to_str(pretty=True).encode())
    write_atomic(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_atomic(folder / "tokenizer.model", tokenizer.path.read_bytes())


def convert(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """The same tokenizer for the `tokenizers` library. Raises UserError if it cannot express the model."""
    import tokenizers
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    model = ModelProto.FromString(tokenizer.path.read_bytes())
    if reason := _why_not_convertible(model):
        raise UserError(
            f"{tokenizer.path}: cannot be converted to tokenizer.json, because {reason}; a model that was trained with "
            "data.tokenizer=train can"
        )
    piece_types = ModelProto.SentencePiece
    ids: dict[str, int] = {}  # of all pieces
    scores: dict[str, float] = {}  # of those that merges make
    for id, piece in enumerate(model.pieces):
        if piece.type == piece_types.NORMAL:
            scores[piece.piece.replace(SPACE_SYMBOL, " ")] = piece.score
            ids[piece.piece.replace(SPACE_SYMBOL, " ")] = id
        else:
            ids[piece.piece] = id
    splits = [  # sorted by falling score, then by ids
        (-score, ids[piece[:cut]], ids[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    bos, unk = tokenizer.piece(tokenizer.bos), tokenizer.piece(tokenizer.unk)
    has_bytes = model.trainer_spec.byte_fallback
    converted = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[pair for *_, pair in sorted(splits)],
            byte_fallback=has_bytes,
            unk_token=unk,
            fuse_unk=not has_bytes,
        )
    )
    decoding_steps = [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:  # as Llama 2: a space before each text
        converted.normalizer = normalizers.Prepend(" ")
        decoding_steps.append(decoders.Strip(" ", 1, 0))
    converted.decoder = decoders.Sequence(decoding_steps)
    converted.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos)]
    )
    special = [piece.piece for piece in model.pieces if piece.type in (piece_types.CONTROL, piece_types.UNKNOWN)]
    converted.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    converted.encode_special_tokens = True  # holds for this object only: tokenizer.json cannot store it
    return converted


def _why_not_convertible(model: Any) -> str | None:
    """Why tokenizer.json cannot express a model; None for those that we train, and for those like Llama 2's."""
    trainer, normalizer, piece_types = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    if trainer.model_type != trainer.BPE:
        return "it is not a BPE model"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return f"it changes texts before encoding them ({normalizer.name or 'whitespace'})"
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return "it marks spaces in an unsupported way"
    if any(piece.type in (piece_types.USER_DEFINED, piece_types.UNUSED) for piece in model.pieces):
        return "it has user-defined or unused pieces"
    if not any(piece.piece == SPACE_SYMBOL for piece in model.pieces):
        return "it has no piece for a space"
    return None
