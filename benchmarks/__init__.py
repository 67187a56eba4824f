"""Results, the GPU script, and scripts that make tables; ``tap-export bench`` measures."""
