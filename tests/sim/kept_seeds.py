"""Seeds that once found something, and what; they run again with every change.

A seed replays the same run only as long as nothing draws another random number before its fault: what it found is also a
transcript in `tests/unit/test_*_machine.py`, which stays.
"""

KEPT_SEEDS: dict[int, str] = {
    204783: "a switch that was prepared at step 0 looked as if its members held the initial state only",
    401938: "a switch that was prepared before its members had read the state was taken for the loss of it",
    2146: "a node that came back as the loop had ended was refused, although its worker could do what on_end asks for",
    514: "a controller that restarted before the first world forgot the checkpoint that it was to begin with",
    51414: "a first world that never read its checkpoint was taken for one that holds the state of step 0",
    53250: "a node that came back could not read what another one had already assembled",
    416: "a controller that was stopped took what it had heard before for a standstill, and its last worker for an early leaver",
    39392: "a leaver died before it had handed its layers over, and the survivor went on with memory that nobody had written",
    10637: "a fence that waited for nodes left those who came out of the world in which lost layers are made from others",
    52744: "a stage died as its neighbours left the loop: those who had left did not help the others to make its layers",
    21539: "the last node that held snapshots was about to leave, and the job waited for others until it gave up",
    65465: "a node that was asked to leave while the state was being restored was not used, though the job needed it",
    21353: "a world of sharded state broke before its first step, and parameters were taken for torn (a fault of this simulator)",
}
