"""The agent: the one daemon on a node. It starts, watches, fences and ends workers, and speaks for them.

`machine.py` decides (pure), the other files perform. It never imports the controller, never imports torch, and never
looks into a tensor.
"""
