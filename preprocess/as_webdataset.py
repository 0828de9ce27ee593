"""The name under which programs of users import `preprocess.shards.as_webdataset`."""

from preprocess.shards.as_webdataset import as_webdataset as as_webdataset
