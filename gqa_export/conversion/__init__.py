"""A checkpoint with fewer key/value heads: MHA -> GQA -> MQA, tensor by tensor, as an ordinary checkpoint."""
