"""Part-of-speech tagging with one pretrained multilingual encoder: a stand-in for the thesis' Table 6.8."""
