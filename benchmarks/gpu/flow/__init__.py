"""Flow models at their true size: SD3.5 medium and FLUX.1 dev with random weights."""
