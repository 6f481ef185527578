"""How resources are kept, served and reconciled; it knows nothing of CML."""
