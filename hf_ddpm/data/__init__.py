"""Images in: a data set becomes uint8 batches in an order of which any place can be asked for."""
