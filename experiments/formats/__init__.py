"""Number formats on real tensors: what integers and floats of the same size lose (`qsnr`)."""
