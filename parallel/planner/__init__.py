"""SkipPipe's planner (Blagoev et al. 2025): which node holds which stage, and the path of each microbatch over nodes.

Pure Python, and no device is needed:

    network.py      machines and links
    files.py        networks as TOML and CSV; those in topologies/ by name
    problem.py      workload, the rules of a path, what fits in the nodes' memory
    arrangement.py  nodes to stages, by annealing; DT-FM's pipelines
    matching.py     the bottleneck pairing of two stages
    paths.py        the fastest path of one route: A*
    conflicts.py    routes that keep the rules together: conflict-based search
    improve.py      better routes by small changes
    events.py       an iteration, event by event
    baselines.py    DT-FM, and DT-FM with stages skipped
    search.py       all of it, until the time is up
    plan.py         what is found, as orders for the pipeline's simulator and executor
    check.py        whether it keeps every hard rule
    progress.py     a progress bar
    report.py       a plan in words
    draw.py         a plan as a picture of its timeline
"""
