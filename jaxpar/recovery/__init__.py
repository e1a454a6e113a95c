"""Losing stages of a model in training, and going on: strategies behind one protocol (`base`), swapped by one option.

    NoFailure            recovers nothing                              exact   memory a stage pays
    CheckFree            mean of both neighbours, by gradient norms    no      none
    CheckFreePlus        that, and edge stages by copy                 no      embedding and head, with moments, twice
    UniformAverage       plain mean of both neighbours                 no      none
    CopyNeighbour        a copy of one neighbour                       no      none
    RandomInit           initialised anew                              no      none
    SkipStage            the identity, which learns again              no      none
    Redundant            the copy on the stage before                  yes     a second state
    ReplicaPeer          a data-parallel replica's                     yes     none beyond the replica
    Snapshot             all stages go back, from memory               yes     a second state, elsewhere
    CheckpointRollback   all stages go back, from disk                 yes     none
    Composite            one, and another for what it cannot           by who  both

`failures` makes the trace that all of them share, `plan` walks it on the host before a run, `transform` puts a strategy
into a step.
"""
