"""From a picture and a prompt to pixels and token ids, as preprocess.json says: numpy, Pillow, tokenizers, jinja2.

Nothing here imports torch or transformers. `export` proves the results equal to those of transformers' processor
(btp_export/model/prove_processor.py). May use graphs.
"""
