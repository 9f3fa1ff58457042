"""Generated from proto/elastic/v1 by `make proto`: the control plane's messages and services. Nothing is edited here."""
