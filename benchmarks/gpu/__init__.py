"""Speed, memory and exactness on one GPU: a script of several questions, see `benchmarks.gpu.__main__`."""
