"""Out to the Hugging Face layout, and in from it: `Llama4ForCausalLM` of transformers computes the same numbers.

    python -m trainer.hub export --checkpoint runs/tiny --out tiny-hf
    python -m trainer.hub import --from tiny-hf --out runs/again

An export streams: one tensor at a time, whatever mesh wrote the checkpoint. It is plain Llama 4 where Llama 4 can say
all that the model is; else it brings a small modelling file with it (`modeling_llama4_biased.py`), and says why.
`train.init_from` begins a run with the weights of such a folder or of a checkpoint, each rank reading its own part.
"""
