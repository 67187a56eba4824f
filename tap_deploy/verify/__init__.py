"""Verification of deployed graphs against the reference: tolerances, comparisons, self-test."""
