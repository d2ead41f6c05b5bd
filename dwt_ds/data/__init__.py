"""Text -> sentences -> tokens -> packed rows -> batches with masks.

`prepare` makes a data folder once (reading, sentences, tokenizer, packing, shards, manifest); training only reads it
(prepared, order, masks, batches).
"""
