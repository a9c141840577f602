"""Everything between a file of texts and a trained prefix: data, collation, the training loop, metrics, run folders.

The modules need the extra ``train`` (``pip install 'prefix_fast[train]'``) only where they say so.
"""
