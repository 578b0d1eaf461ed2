"""What somebody else wrote: the safetensors shards of a checkpoint, and the small files beside them."""
