"""One file per paper: the mathematics as pure functions of tensors, then the method."""
