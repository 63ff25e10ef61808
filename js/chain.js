/** Call `after` whenever the node's own handler `name` has been called. */
export function chain(node, name, after) {
  const before = node[name];
  node[name] = function (...args) {
    const result = before?.apply(this, args);
    after(...args);
    return result;
  };
}
