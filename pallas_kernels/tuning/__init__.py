"""Block sizes that were measured: candidates, their pruning by compiling, their times, and the file that keeps the best."""
