"""The decoder, its weights and its adapters. Arrays only, never text."""
