"""squish_nf4/checkpoint: conversion, resuming, memory; reading, loading, verifying, inspecting, comparing."""
