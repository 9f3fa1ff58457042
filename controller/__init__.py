"""The controller: one per job. Membership, generations, plans, the ledger, and the API for people.

`machine.py` decides (pure), `ledger.py` remembers, `server.py` performs. It never imports the agent and never sees a
tensor.
"""
