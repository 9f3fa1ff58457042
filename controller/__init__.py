"""The controller: one per job. Membership, generations, plans, the ledger, and the API for people.

`machine.py` decides (pure) and says which part decides what; `job.py` is its state, `events.py` what goes in and out.
`ledger.py` remembers, `views.py` shows, `server.py` performs. It never imports the agent and never sees a tensor.
"""
