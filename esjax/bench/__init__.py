"""``esjax bench``: how fast the real programs are on this machine, by a workload file's exact meaning."""
