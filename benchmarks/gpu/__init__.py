"""Whether editing works on a device, and what it costs there, with nothing but made things: `python -m benchmarks.gpu`.

`made` is the model and its facts, `runs` an editor's way through them, `checks` what must hold, `cost` what is
measured, `peak` what a card could do, `command` the command line and the order of it all.
"""
