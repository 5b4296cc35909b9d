"""The store on etcd v3, spoken through its HTTP/JSON gateway."""
