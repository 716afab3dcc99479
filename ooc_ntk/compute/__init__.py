"""Everything done with torch: checking and measuring a model, deriving Jacobian rows, contracting them."""
