"""The network: backbone, fusion, heads, and its files."""
