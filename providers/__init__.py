"""Upstream adapters. A leaf: nothing here knows the gateway."""
