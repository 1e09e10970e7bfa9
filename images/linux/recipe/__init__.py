# SPDX-License-Identifier: Apache-2.0
"""What build-images, and tests that need images of their own, are made of."""
