"""The universal recommendation model: prompt, fusion, heads, loss, SFT, inference."""
