"""One file, one technique: each is put on the plain model from outside, and `parallelize` says in which order."""
