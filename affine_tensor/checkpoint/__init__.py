"""Reading and writing checkpoints: one file per format.

`files` finds and reads files, a format file says which tensors make up a module's
packed weight, `load` puts them into a model, `save` writes them.
"""
