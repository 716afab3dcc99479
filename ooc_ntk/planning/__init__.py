"""Plans: pure arithmetic from a measured workload, a budget and machine rates to a promise that holds."""
