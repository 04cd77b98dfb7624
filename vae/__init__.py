"""The variational autoencoder of the post: layers, loss, model, and what follows training."""
