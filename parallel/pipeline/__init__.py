"""Pipeline schedules as data: an order of tasks for each device, checked, simulated and compiled to a table.

Pure NumPy: nothing here imports JAX, and no device is needed.

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
"""
