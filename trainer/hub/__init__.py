"""Export to the Hugging Face format and import from it, so that other tools can use the weights of a run.

    python -m trainer.hub export --checkpoint runs/tiny --out tiny-hf
    python -m trainer.hub import --from tiny-hf --out runs/again

`Llama4ForCausalLM` of transformers computes the same numbers from an exported folder. If the model has something that
Llama 4 does not have, the export contains a small modelling file (`modeling_llama4_biased.py`) and the command prints
the reason.
`train.init_from` starts a run with the weights of such a folder or of a checkpoint; each rank reads its own shard.
docs/hub.md is the user's manual.

`mapping.py` maps names and settings, `files.py` reads and writes the files, `export.py` and `importer.py` are the two
directions, and `tokenizer.py` converts the tokenizer.
"""
