"""The experiments of the paper and the benchmarks. They use only the public names of wellcond."""
