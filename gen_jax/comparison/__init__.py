"""All strategies on the same data, side by side: quality, sequential evaluations, latency, rate.

A `Comparison` names the runs that are trained and the strategies that draw from them; a `Strategy`
is one entry: which runs it reads, and its sampler. `run.compare` trains what is missing, examines
one strategy after another behind gates of correctness, times all of them in turns, and writes
results.json, tables, figures and a page that needs no network.
"""
