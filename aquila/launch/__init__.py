"""From a hostfile to running ranks.

Processes of a run, from the user's terminal to a rank:

    launcher    `__main__.py`     in the terminal: checks, starts the controller, shows what it reports
    controller  `controller.py`   one per run, in a session of its own: an agent per node, restarts, the end
    agent       `agent.py`        one per node (a child, or over ssh): torchrun, its failures, its clean-up
    torchrun    torch's           one per node
    rank        `rank_wrapper.py` one per device: log file and true exit status around `aquila.pretrain`

Each is told to die with its parent, so no process outlives the run. Nothing here imports torch.
"""
