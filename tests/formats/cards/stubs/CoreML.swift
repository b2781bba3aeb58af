// Signatures of Apple's Core ML, iOS 18 and macOS 15, as its documentation has them, for what cards call.
import Foundation

public enum MLComputeUnits { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

public class MLModelConfiguration {
    public var computeUnits = MLComputeUnits.all

    public init() {}
}

public class MLState {}

public protocol MLShapedArrayScalar {}

extension Float16: MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}

public protocol MLShapedArrayProtocol {
    associatedtype Scalar: MLShapedArrayScalar
}

public struct MLShapedArraySlice<Scalar: MLShapedArrayScalar>: MLShapedArrayProtocol {
    public var scalars: [Scalar] { [] }

    public subscript(index: Int) -> MLShapedArraySlice<Scalar> { self }
}

public struct MLShapedArray<Scalar: MLShapedArrayScalar>: MLShapedArrayProtocol {
    public init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar {}

    public init(_ multiArray: MLMultiArray) {}

    public subscript(index: Int) -> MLShapedArraySlice<Scalar> { fatalError("a stub") }
}

public class MLMultiArray {
    public convenience init<S: MLShapedArrayProtocol>(_ shapedArray: S) { self.init() }

    init() {}
}

public class MLFeatureValue {
    public var multiArrayValue: MLMultiArray? { nil }
}

public protocol MLFeatureProvider {
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws {}

    public func featureValue(for featureName: String) -> MLFeatureValue? { nil }
}

public class MLModel {
    public static func compileModel(at modelURL: URL) async throws -> URL { modelURL }

    public static func load(
        contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()
    ) async throws -> MLModel { MLModel() }

    public func makeState() -> MLState { MLState() }

    public func prediction(from input: MLFeatureProvider, using state: MLState) async throws -> MLFeatureProvider { input }
}
