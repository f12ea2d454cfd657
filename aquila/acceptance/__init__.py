"""Device acceptance: what a new machine must show before weeks of its time are trusted to it.

`table` collects results, the other files hold the checks, each on whatever device is here: `operators` and
`attention` against the definition in `backend/reference.py`, `optimizer`, `model` (blocks, loss, decoding),
`machine` (versions, links), `collectives`, `training` (real runs: ranks, save, kill, resume), `hosts` (a
hostfile's), `released` (a folder of weights), `speed`.
"""
