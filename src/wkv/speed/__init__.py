"""Speed of inference on this machine, ours and that of other programs in turns: what `wkv bench` does.

`contenders` who takes part, `files` the weights they read, `worker` and `runners` the processes in which they run,
`rounds` the turns, `report` what is made of the times, `plot` the picture. Nothing is imported here: workers of other
programs must not load torch along with them.
"""
