"""What tests share: models, inputs, masks, oracles."""
