"""What is inside a `jaxpar.program.Program`: how loss and gradients are made on a kind of mesh.

    whole.py     data, fsdp and tensor axes: one program, spread by the partitioner (GSPMD)
    sequence.py  tokens on several devices: attention by hand over that axis, the partitioner for the others
    pipeline.py  stages: a table of actions, by hand over all axes but `tensor`

Each gives the same two functions, and a step cannot tell them apart.
"""
