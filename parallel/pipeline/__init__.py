"""Pipeline schedules as data: an order of tasks for each device, checked, simulated, compiled to a table, and run.

Pure NumPy, and no device is needed:

    tasks.py     what is run: tasks, where virtual stages lie, and an order of tasks for each device
    orders.py    the schedules by name
    greedy.py    orders for free routes (SkipPipe, CheckFree+): list scheduling
    csv_format.py  an order as text, in the format of torch.distributed.pipelining
    table.py     an order in ticks, with buffer slots and routes: int32 arrays for an SPMD executor
    segments.py  a table's ticks as few loops
    validate.py  every task once, no cycle, and what each action reads from its buffers
    simulate.py  makespan, bubble and memory under given costs
    choose.py    mixed or one-kind ticks, by cost
    draw.py      a schedule as a text table or a picture
    report.py    all of it in words, for `jaxpar schedule`
    config.py    what a run says about its pipeline
    configured.py  the table that follows from it
    split.py     which layers each stage has

On devices:

    execute.py   one SPMD program that runs any table: loss and gradients
    pullback.py  a stage's backward pass in pieces, with as little kept between them as they need
    jaxprs.py    cutting a jaxpr
    branches.py  permutes in branches that devices take differently
    mpmd.py      the same from the host, a jitted function a stage on sub-meshes: to compare with, and for stages that differ
    autodiff.py  GPipe differentiated by JAX, to compare with
"""
