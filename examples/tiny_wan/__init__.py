"""Trains a small Wan pipeline, video autoencoder and transformer, from a folder of clips."""
