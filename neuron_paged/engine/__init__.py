# SPDX-License-Identifier: Apache-2.0
"""The engine: sequences, block allocation, scheduling and batches (numpy), and the model runner around them."""
