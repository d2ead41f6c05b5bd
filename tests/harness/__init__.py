"""What tests share, as pytest plugins; tests/conftest.py names them.

ranks.py       ranks of a run, forked from a server that has torch and DeepSpeed loaded
warm.py        what that server loads
launcher.py    ranks as a user starts them, with the `deepspeed` launcher: slow, so only where the launcher matters
watched.py     ranks that note what they see
tiny.py        a text, its data folder, a teacher and a recipe, and runs of it, which take seconds
runs.py        folders of runs: read, compared, taken back to a checkpoint, written without a run
corpus.py      documents for tests of data and prepare
writers.py     processes that hold a folder's lock
waiting.py     waiting for what another process does
masked_lms.py  small models of many families
key_cases.py   settings for each key of a DeepSpeed JSON, for tests of what the keys do
"""
