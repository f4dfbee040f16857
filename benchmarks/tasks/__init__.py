"""Real text-to-text tasks, built from data that installable packages ship."""
